//! The part of QEMU's plugin interface we use, version 3 (QEMU 9.1 and later), declared by ourselves: distributions ship
//! no header. Names, types and values are those of the interface.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// A translation block while it is translated.
#[repr(C)]
pub(crate) struct Tb {
    _opaque: [u8; 0],
}

/// An instruction of one.
#[repr(C)]
pub(crate) struct Insn {
    _opaque: [u8; 0],
}

/// Numbers per vcpu.
#[repr(C)]
pub(crate) struct Scoreboard {
    _opaque: [u8; 0],
}

/// One 64-bit number in a scoreboard: `qemu_plugin_u64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Counter {
    pub(crate) score: *mut Scoreboard,
    pub(crate) offset: usize,
}

/// `qemu_plugin_reg_descriptor`
#[repr(C)]
struct Register {
    handle: *mut c_void,
    name: *const c_char,
    feature: *const c_char,
}

/// `GArray` and `GByteArray`.
#[repr(C)]
struct Array<T> {
    data: *mut T,
    length: c_uint,
}

/// Number of this plugin, as QEMU gives it.
pub(crate) type Id = u64;

/// `QEMU_PLUGIN_INLINE_ADD_U64`
pub(crate) const ADD: c_int = 0;
/// `QEMU_PLUGIN_CB_NO_REGS`
pub(crate) const NO_REGISTERS: c_int = 0;
/// `QEMU_PLUGIN_CB_R_REGS`
pub(crate) const READ_REGISTERS: c_int = 1;
/// `QEMU_PLUGIN_COND_NE`
pub(crate) const NOT_EQUAL: c_int = 3;

/// Called when a translation block has been translated.
pub(crate) type OnTranslate = extern "C" fn(Id, *mut Tb);
/// Called when an instruction or a block is executed.
pub(crate) type OnExecute = extern "C" fn(c_uint, *mut c_void);
/// Called at the end.
pub(crate) type OnExit = extern "C" fn(Id, *mut c_void);

unsafe extern "C" {
    pub(crate) fn qemu_plugin_tb_n_insns(tb: *const Tb) -> usize;
    pub(crate) fn qemu_plugin_tb_vaddr(tb: *const Tb) -> u64;
    pub(crate) fn qemu_plugin_tb_get_insn(tb: *const Tb, index: usize) -> *mut Insn;
    pub(crate) fn qemu_plugin_insn_data(insn: *const Insn, to: *mut c_void, size: usize) -> usize;
    pub(crate) fn qemu_plugin_insn_size(insn: *const Insn) -> usize;
    pub(crate) fn qemu_plugin_scoreboard_new(size: usize) -> *mut Scoreboard;
    pub(crate) fn qemu_plugin_u64_set(counter: Counter, vcpu: c_uint, value: u64);
    pub(crate) fn qemu_plugin_u64_sum(counter: Counter) -> u64;
    pub(crate) fn qemu_plugin_u64_get(counter: Counter, vcpu: c_uint) -> u64;
    pub(crate) fn qemu_plugin_register_vcpu_tb_trans_cb(id: Id, callback: OnTranslate);
    pub(crate) fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
        tb: *mut Tb,
        operation: c_int,
        counter: Counter,
        value: u64,
    );
    pub(crate) fn qemu_plugin_register_vcpu_tb_exec_cond_cb(
        tb: *mut Tb,
        callback: OnExecute,
        flags: c_int,
        condition: c_int,
        counter: Counter,
        value: u64,
        data: *mut c_void,
    );
    pub(crate) fn qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(
        insn: *mut Insn,
        operation: c_int,
        counter: Counter,
        value: u64,
    );
    pub(crate) fn qemu_plugin_register_vcpu_insn_exec_cb(
        insn: *mut Insn,
        callback: OnExecute,
        flags: c_int,
        data: *mut c_void,
    );
    pub(crate) fn qemu_plugin_register_atexit_cb(id: Id, callback: OnExit, data: *mut c_void);
    fn qemu_plugin_get_registers() -> *mut Array<Register>;
    fn qemu_plugin_read_register(handle: *mut c_void, to: *mut Array<u8>) -> c_int;
    // Of GLib, which QEMU brings along.
    fn g_array_free(array: *mut Array<Register>, data: c_int) -> *mut c_char;
    fn g_byte_array_new() -> *mut Array<u8>;
    fn g_byte_array_free(array: *mut Array<u8>, data: c_int) -> *mut u8;
}

/// A register of the vcpu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Rax,
    Rdx,
}

/// A register of the vcpu that executes. Only for callbacks that were registered with [`READ_REGISTERS`].
pub(crate) fn register(name: Name) -> Option<u64> {
    static HANDLES: OnceLock<[usize; 2]> = OnceLock::new();
    let handles = HANDLES.get_or_init(|| {
        // SAFETY: a vcpu executes; QEMU hands over an array of its registers, whose names live as long as QEMU.
        unsafe {
            let registers = qemu_plugin_get_registers();
            let all = std::slice::from_raw_parts((*registers).data, (*registers).length as usize);
            let find = |name| all.iter().find(|register| CStr::from_ptr(register.name) == name);
            let handles = [c"rax", c"rdx"].map(|name| find(name).map_or(0, |register| register.handle as usize));
            g_array_free(registers, 1);
            handles
        }
    });
    let handle = handles[name as usize];
    if handle == 0 {
        return None;
    }
    // SAFETY: the handle is QEMU's own; the array is made, read and given back here.
    unsafe {
        let array = g_byte_array_new();
        qemu_plugin_read_register(handle as *mut c_void, array);
        let value =
            ((*array).length as usize == size_of::<u64>()).then(|| (*array).data.cast::<u64>().read_unaligned());
        g_byte_array_free(array, 1);
        value
    }
}

/// The version of the interface that this file declares; QEMU refuses a plugin it does not fit.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "the name QEMU looks for")]
pub(crate) static qemu_plugin_version: c_int = 3;

/// The first function QEMU calls; a result other than 0 refuses the plugin.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn qemu_plugin_install(
    id: Id,
    _info: *const c_void,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: QEMU passes `count` C strings that live until this function returns; none is null. Without any, the array
    // may be null, and is not looked at.
    let arguments = (0..count).map(|index| unsafe { CStr::from_ptr(*arguments.add(index)) });
    let arguments: Vec<String> = arguments.map(|text| text.to_string_lossy().into_owned()).collect();
    match crate::count::install(id, &arguments) {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("plugin: {why}");
            -1
        }
    }
}
