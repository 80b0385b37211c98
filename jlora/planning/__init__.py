"""Plans: what a training step needs on devices that are not here."""
