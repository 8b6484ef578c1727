"""What the benchmarks stand on: servers, flows and contenders in processes of their own."""
