"""A log becomes tensors: event log, schema, catalogue, histories, splits, batches, samplers.

Import from the modules; this package imports nothing itself, so that models need torch and numpy alone.
"""
