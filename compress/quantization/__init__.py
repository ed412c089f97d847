"""Grids, scales and the GPTQ solver: functions on tensors that know neither files nor models."""
