"""What a run will take, before it starts: memory, time and price. No model is built."""
