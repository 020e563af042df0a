"""Which weight of BASE and TUNED belongs to which weight of INSTRUCT."""
