"""What a run will take before it is started: memory by class, time, and the cheapest change that makes it fit."""
