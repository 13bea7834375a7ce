"""What runs beside the device: one loaded model per worker, its measurements and its scores. Works without Ray."""
