"""Published methods, one small file each: how their selection maps onto the compiler's families."""
