"""What the machine offers: files, memory, devices and processors."""
