"""Products written for one kind of device, with the plain ones to fall back on."""
