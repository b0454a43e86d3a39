"""The small pre-trained edit model and the sample pairs of the demo."""
