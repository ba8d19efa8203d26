"""The fast path: the same numbers as TRL with less work. Knows torch, PEFT and TRL's fused-head hook, no run.

tree         a batch packed into one row, with common prefixes stored once
attention    attention over the packed row
head         log-probabilities of the scored tokens in one pass over the vocabulary
lora         LoRA layers with fewer passes over memory
elementwise  RMSNorm and gated SiLU that keep fewer activations
forward      runs the tree behind TRL's fused LM head
packing      decides by a trial whether a model can use the fast path
"""
