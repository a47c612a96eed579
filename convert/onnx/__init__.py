"""ONNX graphs, written from a model's configuration: what a family's decoder computes, its nodes, and what lies beside them."""
