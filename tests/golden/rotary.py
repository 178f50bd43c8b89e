@T.prim_func(s_tir=True)
def rotary(x_h: T.handle("float32"), y_h: T.handle("float32"), c_h: T.handle("float32"), s_h: T.handle("float32"), S: T.int64, half: T.int64, heads: T.int64, tasks: T.int64, per: T.int64, x_stride: T.int64, x_span: T.int64, x_head: T.int64, x_batch: T.int64, y_stride: T.int64, y_span: T.int64, y_head: T.int64, y_batch: T.int64, c_stride: T.int64, c_span: T.int64, c_batch: T.int64, s_stride: T.int64, s_span: T.int64, s_batch: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "rotary"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    c = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=c_h, align=4)
    s = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=s_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    for task in T.parallel(tasks):
        batch_at = T.alloc_buffer((1,), "int64", scope="global")
        batch_at[0] = task // heads // per
        batch: T.let = batch_at[0]
        head_at = T.alloc_buffer((1,), "int64", scope="global")
        head_at[0] = task % heads
        head: T.let = head_at[0]
        start_at = T.alloc_buffer((1,), "int64", scope="global")
        start_at[0] = (task // heads) % per * 2
        start: T.let = start_at[0]
        left_at = T.alloc_buffer((1,), "int64", scope="global")
        left_at[0] = T.min((S - start + 1) // 2, T.int64(1))
        left: T.let = left_at[0]
        if left == 1:
            xt_at = T.alloc_buffer((1,), "int64", scope="global")
            xt_at[0] = batch * x_batch + start // 64 * x_span + start % 64 + T.int64(0) + head * x_head
            xt: T.let = xt_at[0]
            yt_at = T.alloc_buffer((1,), "int64", scope="global")
            yt_at[0] = batch * y_batch + start // 64 * y_span + start % 64 + T.int64(0) + head * y_head
            yt: T.let = yt_at[0]
            ct_at = T.alloc_buffer((1,), "int64", scope="global")
            ct_at[0] = batch * c_batch + start // 64 * c_span + start % 64 + T.int64(0)
            ct: T.let = ct_at[0]
            st_at = T.alloc_buffer((1,), "int64", scope="global")
            st_at[0] = batch * s_batch + start // 64 * s_span + start % 64 + T.int64(0)
            st: T.let = st_at[0]
            for d in range(half):
                low_1: T.let = x[T.ramp(xt + (d) * x_stride + 0, 1, 2)]
                high_2: T.let = x[T.ramp(xt + (d + half) * x_stride + 0, 1, 2)]
                y[T.ramp(yt + (d) * y_stride + 0, 1, 2)] = low_1 * c[T.ramp(ct + (d) * c_stride + 0, 1, 2)] - high_2 * s[T.ramp(st + (d) * s_stride + 0, 1, 2)]
                y[T.ramp(yt + (d + half) * y_stride + 0, 1, 2)] = high_2 * c[T.ramp(ct + (d + half) * c_stride + 0, 1, 2)] + low_1 * s[T.ramp(st + (d + half) * s_stride + 0, 1, 2)]
