"""What Pyro's ``SVI`` sees: an objective on a sampler. Imports ``samplers`` and what stands below."""
