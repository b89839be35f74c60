"""The gRPC services: translate, authorise, call the domain, translate back. One file a service."""
