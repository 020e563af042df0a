"""PEFT adapters as deltas: what kind, which values, how they merge, how they become an adapter of INSTRUCT."""
