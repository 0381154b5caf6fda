"""Where measurements go: metrics.jsonl, the console, TensorBoard, Weights & Biases.

sinks.py states what a sink has to do, options.py lists those there are, fanout.py opens them and writes to all.
"""
