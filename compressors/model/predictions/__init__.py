"""What a model predicts and chooses: log-probabilities, losses, drawn tokens, and the experts that tokens used."""
