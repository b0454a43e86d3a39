"""What a training needs in device and host memory, computed before anything is loaded."""
