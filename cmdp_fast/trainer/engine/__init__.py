"""Rollouts on vLLM: a server that the run starts, or servers that run elsewhere.

engine.py     what a collector asks: completions of prompts by the weights of a step
server.py     a server of the run's own; keeper.py is the process that ends it, whatever becomes of the run
client.py     one server's HTTP interface, with its time limits
threads.py    calls that nobody waits for at the end
answers.py    what a server answered, checked
weights.py    the way of a step's weights to the servers
probe.py      the comparison of a server's log-probabilities with the trainer's, after each transfer
"""
