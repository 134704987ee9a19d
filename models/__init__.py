"""Model definitions that no library has (STDiT3, the temporal autoencoder) and adapters that declare family traits."""
