"""Measuring a model's parts on the hardware at hand; run time needs torch, numpy and safetensors only."""
