"""ComfyUI nodes: turn widgets and sockets into trainer_core configs and calls, and return the results."""
