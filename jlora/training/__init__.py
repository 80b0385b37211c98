"""Training: recipes, data, meshes, the step, and the loop around it."""
