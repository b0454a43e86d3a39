"""ComfyUI's side: widgets and sockets to trainer_core's configs and calls, and results back."""
