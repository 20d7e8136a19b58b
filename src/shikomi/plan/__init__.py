"""What a run will take, before it starts, and the recipe to start from. No model is built."""
