@T.prim_func(s_tir=True)
def spmv(x_h: T.handle("float32"), y_h: T.handle("float32"), bias_h: T.handle("float32"), ptr0_h: T.handle("int32"), bits0_h: T.handle("uint16"), val0_h: T.handle("float32"), N: T.int64, chunk: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmv"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    bits0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=bits0_h, align=2)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=val0_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    for task in T.parallel((N + chunk - 1) // chunk):
        first_at = T.alloc_buffer((1,), "int64", scope="global")
        first_at[0] = task * chunk
        first: T.let = first_at[0]
        last_at = T.alloc_buffer((1,), "int64", scope="global")
        last_at[0] = T.min(N, first + chunk)
        last: T.let = last_at[0]
        for n in range(last - first):
            y[first + n] = bias[first + n]
        for p0 in range(P0):
            for i in range((last - first + 3) // 4):
                parent0: T.let = p0 * ((N + 3) // 4) + first // 4 + i
                row_1: T.let = first + i * 4
                acc = T.alloc_buffer((16,), "float32", scope="global")
                acc[T.ramp(0, 1, 4)] = T.broadcast(T.float32(0), 4)
                acc[T.ramp(4, 1, 4)] = T.broadcast(T.float32(0), 4)
                acc[T.ramp(8, 1, 4)] = T.broadcast(T.float32(0), 4)
                acc[T.ramp(12, 1, 4)] = T.broadcast(T.float32(0), 4)
                words0: T.let = (C0 + 15) // 16
                at0 = T.alloc_buffer((1,), "int64", scope="global")
                mask0 = T.alloc_buffer((1,), "int32", scope="global")
                at0[0] = T.Cast("int64", ptr0[parent0])
                for word in range(words0):
                    mask0[0] = T.Cast("int32", bits0[parent0 * words0 + word])
                    while mask0[0] != 0:
                        block_2: T.let = at0[0]
                        xb_3: T.let = (p0 * C0 + word * 16 + T.Cast("int64", T.call_llvm_pure_intrin("int32", "llvm.cttz", mask0[0], T.bool(True)))) * 1
                        acc[T.ramp(0, 1, 4)] = acc[T.ramp(0, 1, 4)] + val0[T.ramp(block_2 * 4 + 0 * 4 + 0, 1, 4)] * T.broadcast(x[xb_3 + 0], 4)
                        at0[0] = at0[0] + T.int64(1)
                        mask0[0] = T.bitwise_and(mask0[0], mask0[0] - 1)
                acc[T.ramp(0, 1, 4)] = acc[T.ramp(0, 1, 4)] + acc[T.ramp(4, 1, 4)]
                acc[T.ramp(0, 1, 4)] = acc[T.ramp(0, 1, 4)] + acc[T.ramp(8, 1, 4)]
                acc[T.ramp(0, 1, 4)] = acc[T.ramp(0, 1, 4)] + acc[T.ramp(12, 1, 4)]
                for b in range(T.min(T.int64(4), N - row_1)):
                    y[row_1 + b] = y[row_1 + b] + acc[0 + b]
