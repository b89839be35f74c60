"""The control plane: takes gRPC calls, keeps the records, decides, and drives Ray."""
