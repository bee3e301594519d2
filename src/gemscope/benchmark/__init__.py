"""Floor 4: our trainer on tasks whose answer is known, beside recorded peers."""
