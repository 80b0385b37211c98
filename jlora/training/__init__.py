"""Training: meshes and shardings, and what is built on them."""
