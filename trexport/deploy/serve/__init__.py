"""What runs inside the server: the models of Triton's python backend."""
