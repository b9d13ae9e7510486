"""What checkpoints call the matrices of an expert: by what they do, as Mixtral's papers number them, or stacked."""

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"

NUMBERED = {"w1": GATE, "w2": DOWN, "w3": UP}
"""Last part of a module's name -> what runtimes look up instead."""

STACKED = {"gate_up_proj": (GATE, UP), DOWN: (DOWN,)}
"""Last part of the name of a 3-D tensor with all experts of a layer -> the matrices whose rows follow each other in
every expert."""
