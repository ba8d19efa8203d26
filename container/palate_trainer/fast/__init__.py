"""Where the trainer's speed is made: the same numbers as TRL's, with less work. Knows torch, PEFT and TRL's hook, no run.

tree        a batch as one packed row, common beginnings once
attention   attention over such a row
head        log-probabilities of the scored tokens in one pass over the vocabulary
lora        LoRA layers without needless passes over memory
forward     all of it behind TRL's fused LM head
compact     TRL's own path, scoring labelled tokens only: for models that cannot take a tree
"""
