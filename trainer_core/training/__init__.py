"""Training steps and validation: objective, optimizer, learning rate schedule, EMA."""
