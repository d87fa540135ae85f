"""How clients run: local training, client hosts, the in-process and the Ray backend."""
