"""What each tensor's range is and where QuantizeLinear/DequantizeLinear stand."""
