"""How a graft is planned and streamed."""
