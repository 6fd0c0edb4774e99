"""How far a proxy can be trusted: its scores beside fine-tuning, at matched MACs.

`drawing` chooses policies, `variants` names the ways to score them, `truth` fine-tunes, `journal`
keeps all of it, `statistics` compares, `study` goes through it from the first to the last step.
"""
