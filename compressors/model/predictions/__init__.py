"""A model's predictions and choices: log-probabilities, losses, drawn tokens, and the experts that tokens used."""
