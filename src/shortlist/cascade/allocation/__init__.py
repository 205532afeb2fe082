"""Which chain each request is answered by: contract, solver, reward models, allocators, controllers."""
