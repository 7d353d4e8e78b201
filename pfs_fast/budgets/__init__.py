"""From scores of channels to a structure: what a slim network may cost, what it does cost, and the solver."""
