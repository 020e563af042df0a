"""What the process and the machine give: threads, a bar, a quick start, one process that works for all."""
