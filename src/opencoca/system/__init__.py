"""Files, memory, devices and processors."""
