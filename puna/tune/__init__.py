"""What recipes that tune a trained model share: which model and what of it is trained, which rows, what is saved."""
