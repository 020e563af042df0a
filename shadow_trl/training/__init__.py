"""TRL's trainers on BASE that end in a graft."""
