@T.prim_func(s_tir=True)
def attention(q_h: T.handle("float32"), y_h: T.handle("float32"), scale_h: T.handle("float32"), k_h: T.handle("float32"), v_h: T.handle("float32"), mask_h: T.handle("float32"), tiles_h: T.handle("float32"), S: T.int64, Sk: T.int64, heads: T.int64, group: T.int64, tasks: T.int64, per: T.int64, q_stride: T.int64, q_span: T.int64, q_head: T.int64, q_batch: T.int64, y_stride: T.int64, y_span: T.int64, y_head: T.int64, y_batch: T.int64, k_stride: T.int64, k_span: T.int64, k_head: T.int64, k_batch: T.int64, v_stride: T.int64, v_span: T.int64, v_head: T.int64, v_batch: T.int64, m_stride: T.int64, m_span: T.int64, m_head: T.int64, m_batch: T.int64, t_row: T.int64, t_head: T.int64, t_batch: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "attention"})
    q = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=q_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    scale = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=scale_h, align=4)
    k = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=k_h, align=4)
    v = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=v_h, align=4)
    mask = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=mask_h, align=4)
    tiles = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=tiles_h, align=4)
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
        start_at[0] = task // heads % per * 2
        start: T.let = start_at[0]
        left_at = T.alloc_buffer((1,), "int64", scope="global")
        left_at[0] = T.min((S - start + 1) // 2, T.int64(1))
        left: T.let = left_at[0]
        shared_at = T.alloc_buffer((1,), "int64", scope="global")
        shared_at[0] = head // group
        shared: T.let = shared_at[0]
        kt_at = T.alloc_buffer((1,), "int64", scope="global")
        kt_at[0] = batch * k_batch + shared * k_head
        kt: T.let = kt_at[0]
        vt_at = T.alloc_buffer((1,), "int64", scope="global")
        vt_at[0] = batch * v_batch + shared * v_head
        vt: T.let = vt_at[0]
        if left == 1:
            offset_at = T.alloc_buffer((1,), "int64", scope="global")
            offset_at[0] = T.int64(0)
            offset: T.let = offset_at[0]
            qt_at = T.alloc_buffer((1,), "int64", scope="global")
            qt_at[0] = batch * q_batch + start // 64 * q_span + start % 64 + head * q_head + offset
            qt: T.let = qt_at[0]
            yt_at = T.alloc_buffer((1,), "int64", scope="global")
            yt_at[0] = batch * y_batch + start // 64 * y_span + start % 64 + head * y_head + offset
            yt: T.let = yt_at[0]
            mt_at = T.alloc_buffer((1,), "int64", scope="global")
            mt_at[0] = batch * m_batch + start // 64 * m_span + start % 64 + head * m_head + offset
            mt: T.let = mt_at[0]
            tt_at = T.alloc_buffer((1,), "int64", scope="global")
            tt_at[0] = batch * t_batch + head * t_head + start // 64 * t_row
            tt: T.let = tt_at[0]
            p = T.alloc_buffer((128,), "float32", scope="global")
            top = T.alloc_buffer((2,), "float32", scope="global")
            total = T.alloc_buffer((2,), "float32", scope="global")
            shift = T.alloc_buffer((2,), "float32", scope="global")
            fade = T.alloc_buffer((2,), "float32", scope="global")
            top[T.ramp(0, 1, 2)] = T.broadcast(T.float32("-inf"), 2)
            total[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
            for d in range(6):
                y[T.ramp(yt + d * y_stride + 0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
            for block in range((Sk + 63) // 64):
                kind_at = T.alloc_buffer((1,), "int64", scope="global")
                kind_at[0] = T.Cast('int64', tiles[tt + block])
                kind: T.let = kind_at[0]
                if kind != 0:
                    key_at = T.alloc_buffer((1,), "int64", scope="global")
                    key_at[0] = block * 64
                    key: T.let = key_at[0]
                    count_at = T.alloc_buffer((1,), "int64", scope="global")
                    count_at[0] = T.min(Sk - key, T.int64(64))
                    count: T.let = count_at[0]
                    kb_at = T.alloc_buffer((1,), "int64", scope="global")
                    kb_at[0] = kt + block * k_span
                    kb: T.let = kb_at[0]
                    vb_at = T.alloc_buffer((1,), "int64", scope="global")
                    vb_at[0] = vt + block * v_span
                    vb: T.let = vb_at[0]
                    shift[T.ramp(0, 1, 2)] = top[T.ramp(0, 1, 2)]
                    for j in range(count // 4):
                        acc0 = T.alloc_buffer((2,), "float32", scope="global")
                        acc1 = T.alloc_buffer((2,), "float32", scope="global")
                        acc2 = T.alloc_buffer((2,), "float32", scope="global")
                        acc3 = T.alloc_buffer((2,), "float32", scope="global")
                        acc0[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
                        acc1[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
                        acc2[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
                        acc3[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
                        for d in range(6):
                            acc0[T.ramp(0, 1, 2)] = acc0[T.ramp(0, 1, 2)] + T.broadcast(k[kb + d * k_stride + j * 4 + 0], 2) * q[T.ramp(qt + d * q_stride + 0, 1, 2)]
                            acc1[T.ramp(0, 1, 2)] = acc1[T.ramp(0, 1, 2)] + T.broadcast(k[kb + d * k_stride + j * 4 + 1], 2) * q[T.ramp(qt + d * q_stride + 0, 1, 2)]
                            acc2[T.ramp(0, 1, 2)] = acc2[T.ramp(0, 1, 2)] + T.broadcast(k[kb + d * k_stride + j * 4 + 2], 2) * q[T.ramp(qt + d * q_stride + 0, 1, 2)]
                            acc3[T.ramp(0, 1, 2)] = acc3[T.ramp(0, 1, 2)] + T.broadcast(k[kb + d * k_stride + j * 4 + 3], 2) * q[T.ramp(qt + d * q_stride + 0, 1, 2)]
                        score_1: T.let = acc0[T.ramp(0, 1, 2)] * T.broadcast(scale[0], 2)
                        p[T.ramp((j * 4 + 0) * 2 + 0, 1, 2)] = score_1
                        top[T.ramp(0, 1, 2)] = T.max(top[T.ramp(0, 1, 2)], score_1)
                        score_2: T.let = acc1[T.ramp(0, 1, 2)] * T.broadcast(scale[0], 2)
                        p[T.ramp((j * 4 + 1) * 2 + 0, 1, 2)] = score_2
                        top[T.ramp(0, 1, 2)] = T.max(top[T.ramp(0, 1, 2)], score_2)
                        score_3: T.let = acc2[T.ramp(0, 1, 2)] * T.broadcast(scale[0], 2)
                        p[T.ramp((j * 4 + 2) * 2 + 0, 1, 2)] = score_3
                        top[T.ramp(0, 1, 2)] = T.max(top[T.ramp(0, 1, 2)], score_3)
                        score_4: T.let = acc3[T.ramp(0, 1, 2)] * T.broadcast(scale[0], 2)
                        p[T.ramp((j * 4 + 3) * 2 + 0, 1, 2)] = score_4
                        top[T.ramp(0, 1, 2)] = T.max(top[T.ramp(0, 1, 2)], score_4)
                    for j in range(count % 4):
                        acc0 = T.alloc_buffer((2,), "float32", scope="global")
                        acc0[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
                        for d in range(6):
                            acc0[T.ramp(0, 1, 2)] = acc0[T.ramp(0, 1, 2)] + T.broadcast(k[kb + d * k_stride + (count // 4 * 4 + j) + 0], 2) * q[T.ramp(qt + d * q_stride + 0, 1, 2)]
                        score_5: T.let = acc0[T.ramp(0, 1, 2)] * T.broadcast(scale[0], 2)
                        p[T.ramp(((count // 4 * 4 + j) + 0) * 2 + 0, 1, 2)] = score_5
                        top[T.ramp(0, 1, 2)] = T.max(top[T.ramp(0, 1, 2)], score_5)
                    if kind == 2:
                        top[T.ramp(0, 1, 2)] = shift[T.ramp(0, 1, 2)]
                        for j in range(count):
                            score_6: T.let = p[T.ramp(j * 2 + 0, 1, 2)] + mask[T.ramp(mt + (key + j) * m_stride + 0, 1, 2)]
                            p[T.ramp(j * 2 + 0, 1, 2)] = score_6
                            top[T.ramp(0, 1, 2)] = T.max(top[T.ramp(0, 1, 2)], score_6)
                    seen_7: T.let = T.Select(top[T.ramp(0, 1, 2)] == T.broadcast(T.float32("-inf"), 2), T.broadcast(T.float32(0.0), 2), top[T.ramp(0, 1, 2)])
                    fade[T.ramp(0, 1, 2)] = shift[T.ramp(0, 1, 2)] - seen_7
                    shift[T.ramp(0, 1, 2)] = seen_7
                    v_8: T.let = fade[T.ramp(0, 1, 2)]
                    sum_9: T.let = T.call_llvm_pure_intrin("float32x2", "llvm.fmuladd", v_8, T.broadcast(T.float32(1.4426950408889634), 2), T.broadcast(T.float32(12583039.0), 2))
                    r_10: T.let = T.call_llvm_pure_intrin("float32x2", "llvm.fmuladd", v_8, T.broadcast(T.float32(1.4426950408889634), 2), (T.broadcast(T.float32(0.0), 2) - (sum_9 - T.broadcast(T.float32(12583039.0), 2))))
                    p_11: T.let = T.broadcast(T.float32(0.0013264728477224708), 2) * r_10 + T.broadcast(T.float32(0.009671513922512531), 2)
                    p_12: T.let = p_11 * r_10 + T.broadcast(T.float32(0.05550733581185341), 2)
                    p_13: T.let = p_12 * r_10 + T.broadcast(T.float32(0.24022242426872253), 2)
                    p_14: T.let = p_13 * r_10 + T.broadcast(T.float32(0.6931470036506653), 2)
                    p_15: T.let = p_14 * r_10 + T.broadcast(T.float32(1.0), 2)
                    power_16: T.let = T.reinterpret("float32x2", T.shift_left(T.reinterpret("int32x2", sum_9), T.broadcast(T.int32(23), 2)))
                    exp_17: T.let = p_15 * power_16
                    p_18: T.let = T.Select(v_8 < T.broadcast(T.float32(-87.0), 2), T.broadcast(T.float32(0.0), 2), exp_17)
                    fade[T.ramp(0, 1, 2)] = p_18
                    total[T.ramp(0, 1, 2)] = total[T.ramp(0, 1, 2)] * fade[T.ramp(0, 1, 2)]
                    for j in range(count):
                        v_19: T.let = p[T.ramp(j * 2 + 0, 1, 2)] - shift[T.ramp(0, 1, 2)]
                        sum_20: T.let = T.call_llvm_pure_intrin("float32x2", "llvm.fmuladd", v_19, T.broadcast(T.float32(1.4426950408889634), 2), T.broadcast(T.float32(12583039.0), 2))
                        r_21: T.let = T.call_llvm_pure_intrin("float32x2", "llvm.fmuladd", v_19, T.broadcast(T.float32(1.4426950408889634), 2), (T.broadcast(T.float32(0.0), 2) - (sum_20 - T.broadcast(T.float32(12583039.0), 2))))
                        p_22: T.let = T.broadcast(T.float32(0.0013264728477224708), 2) * r_21 + T.broadcast(T.float32(0.009671513922512531), 2)
                        p_23: T.let = p_22 * r_21 + T.broadcast(T.float32(0.05550733581185341), 2)
                        p_24: T.let = p_23 * r_21 + T.broadcast(T.float32(0.24022242426872253), 2)
                        p_25: T.let = p_24 * r_21 + T.broadcast(T.float32(0.6931470036506653), 2)
                        p_26: T.let = p_25 * r_21 + T.broadcast(T.float32(1.0), 2)
                        power_27: T.let = T.reinterpret("float32x2", T.shift_left(T.reinterpret("int32x2", sum_20), T.broadcast(T.int32(23), 2)))
                        exp_28: T.let = p_26 * power_27
                        p_29: T.let = T.Select(v_19 < T.broadcast(T.float32(-87.0), 2), T.broadcast(T.float32(0.0), 2), exp_28)
                        p[T.ramp(j * 2 + 0, 1, 2)] = p_29
                        total[T.ramp(0, 1, 2)] = total[T.ramp(0, 1, 2)] + p_29
                    for i in range(1):
                        sum0 = T.alloc_buffer((2,), "float32", scope="global")
                        sum1 = T.alloc_buffer((2,), "float32", scope="global")
                        sum2 = T.alloc_buffer((2,), "float32", scope="global")
                        sum3 = T.alloc_buffer((2,), "float32", scope="global")
                        sum0[T.ramp(0, 1, 2)] = y[T.ramp(yt + (i * 4 + 0) * y_stride + 0, 1, 2)] * fade[T.ramp(0, 1, 2)]
                        sum1[T.ramp(0, 1, 2)] = y[T.ramp(yt + (i * 4 + 1) * y_stride + 0, 1, 2)] * fade[T.ramp(0, 1, 2)]
                        sum2[T.ramp(0, 1, 2)] = y[T.ramp(yt + (i * 4 + 2) * y_stride + 0, 1, 2)] * fade[T.ramp(0, 1, 2)]
                        sum3[T.ramp(0, 1, 2)] = y[T.ramp(yt + (i * 4 + 3) * y_stride + 0, 1, 2)] * fade[T.ramp(0, 1, 2)]
                        for j in range(count):
                            sum0[T.ramp(0, 1, 2)] = sum0[T.ramp(0, 1, 2)] + T.broadcast(v[vb + (i * 4 + 0) * v_stride + j], 2) * p[T.ramp(j * 2 + 0, 1, 2)]
                            sum1[T.ramp(0, 1, 2)] = sum1[T.ramp(0, 1, 2)] + T.broadcast(v[vb + (i * 4 + 1) * v_stride + j], 2) * p[T.ramp(j * 2 + 0, 1, 2)]
                            sum2[T.ramp(0, 1, 2)] = sum2[T.ramp(0, 1, 2)] + T.broadcast(v[vb + (i * 4 + 2) * v_stride + j], 2) * p[T.ramp(j * 2 + 0, 1, 2)]
                            sum3[T.ramp(0, 1, 2)] = sum3[T.ramp(0, 1, 2)] + T.broadcast(v[vb + (i * 4 + 3) * v_stride + j], 2) * p[T.ramp(j * 2 + 0, 1, 2)]
                        y[T.ramp(yt + (i * 4 + 0) * y_stride + 0, 1, 2)] = sum0[T.ramp(0, 1, 2)]
                        y[T.ramp(yt + (i * 4 + 1) * y_stride + 0, 1, 2)] = sum1[T.ramp(0, 1, 2)]
                        y[T.ramp(yt + (i * 4 + 2) * y_stride + 0, 1, 2)] = sum2[T.ramp(0, 1, 2)]
                        y[T.ramp(yt + (i * 4 + 3) * y_stride + 0, 1, 2)] = sum3[T.ramp(0, 1, 2)]
                    for i in range(2):
                        sum0 = T.alloc_buffer((2,), "float32", scope="global")
                        sum0[T.ramp(0, 1, 2)] = y[T.ramp(yt + ((4 + i) + 0) * y_stride + 0, 1, 2)] * fade[T.ramp(0, 1, 2)]
                        for j in range(count):
                            sum0[T.ramp(0, 1, 2)] = sum0[T.ramp(0, 1, 2)] + T.broadcast(v[vb + ((4 + i) + 0) * v_stride + j], 2) * p[T.ramp(j * 2 + 0, 1, 2)]
                        y[T.ramp(yt + ((4 + i) + 0) * y_stride + 0, 1, 2)] = sum0[T.ramp(0, 1, 2)]
            total[T.ramp(0, 1, 2)] = T.Select(total[T.ramp(0, 1, 2)] == T.broadcast(T.float32(0.0), 2), T.broadcast(T.float32(0.0), 2), T.broadcast(T.float32(1.0), 2) / total[T.ramp(0, 1, 2)])
            for d in range(6):
                y[T.ramp(yt + d * y_stride + 0, 1, 2)] = y[T.ramp(yt + d * y_stride + 0, 1, 2)] * total[T.ramp(0, 1, 2)]
