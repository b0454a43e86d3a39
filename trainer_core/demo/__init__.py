"""The demo: a small pre-trained edit model and sample pairs."""
