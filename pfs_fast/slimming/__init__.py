"""From a structure to a slim module with weights of its own, and the proof that it is the right one."""
