"""Which method for which task: the rules, what an outcome will take, and the recipe or prompt to start from."""
