//! The counters, and what QEMU calls to keep them.

use crate::code;
use crate::owner::{OWNERS, Owner, Owners};
use crate::qemu::{self, Counter, Id, Insn, Name, Scoreboard, Tb};
use crate::stays::Stays;
use crate::text::Text;
use marker::Kind;
use std::collections::HashMap;
use std::ffi::{c_uint, c_void};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Places whose instructions are counted apart; those that find no room share the last.
const PLACES: usize = 1 << 16;

/// The port that takes the bytes for the first serial line.
const COM1: u64 = 0x3f8;

// The numbers of a scoreboard.
const INSNS: usize = 0;
const CR3: usize = INSNS + OWNERS;
const ENTRIES: usize = CR3 + OWNERS;
/// The owner that executes, which is no count.
const LAST: usize = ENTRIES + OWNERS * OWNERS;
const AT: usize = LAST + 1;

struct Plugin {
    score: Board,
    state: Mutex<State>,
}

/// The scoreboard, made once and never given back.
struct Board(*mut Scoreboard);
// SAFETY: the pointer is only handed to QEMU's functions, which take any thread's calls.
unsafe impl Send for Board {}
// SAFETY: as above.
unsafe impl Sync for Board {}

struct State {
    owners: Owners,
    profile: bool,
    /// The number of each place in the scoreboard, and their addresses by number.
    places: HashMap<u64, usize>,
    addresses: Vec<u64>,
    /// Entries are rare enough to be counted by function.
    entries: [u64; OWNERS * OWNERS],
    /// Stays in ring 0 by length, if that is wanted.
    stays: Option<Stays>,
    /// Whether no kernel has executed anything so far.
    kernel_is_awaited: bool,
    /// The text whose end on the first serial line closes a window, if that is wanted.
    text: Option<Text>,
    /// What had been counted when a window that is open began.
    open: HashMap<u16, Snapshot>,
    out: BufWriter<File>,
}

/// What has been counted since power-on.
#[derive(Default)]
struct Snapshot {
    /// The numbers of the scoreboard.
    counts: Vec<u64>,
    stays: Vec<u64>,
}

static PLUGIN: OnceLock<Plugin> = OnceLock::new();

impl Plugin {
    fn counter(&self, number: usize) -> Counter {
        Counter { score: self.score.0, offset: number * size_of::<u64>() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything counted since power-on.
    fn now(&self, state: &State) -> Snapshot {
        let in_use = AT + state.addresses.len();
        // SAFETY: every number is inside the scoreboard, whose size was given when it was made.
        let sum = |number| unsafe { qemu::qemu_plugin_u64_sum(self.counter(number)) };
        let mut counts: Vec<u64> = (0..in_use).map(sum).collect();
        counts[ENTRIES..LAST].copy_from_slice(&state.entries);
        Snapshot { counts, stays: state.stays.as_ref().map(Stays::counts).unwrap_or_default() }
    }

    /// The owner an executed block belongs to differs from the last one's. The block is not counted yet.
    /// `data` is the owner's number, or for ring 0 the block's address.
    fn enter(&self, vcpu: c_uint, data: usize) {
        let owner = if data < OWNERS { data } else { Owner::Ring0 as usize };
        let last = self.counter(LAST);
        // SAFETY: the vcpu executes, and the number is inside the scoreboard.
        let before = unsafe { qemu::qemu_plugin_u64_get(last, vcpu) };
        let before = usize::try_from(before).unwrap_or(0).min(OWNERS - 1);
        let mut state = self.state();
        state.entries[before * OWNERS + owner] += 1;
        let first = owner == Owner::Kernel as usize && std::mem::take(&mut state.kernel_is_awaited);
        if let Some(stays) = &mut state.stays {
            // SAFETY: the number is inside the scoreboard.
            let executed = unsafe { qemu::qemu_plugin_u64_sum(self.counter(INSNS + Owner::Ring0 as usize)) };
            if owner == Owner::Ring0 as usize {
                stays.begin(before, data as u64, executed);
            } else {
                stays.end(executed);
            }
        }
        drop(state);
        if first {
            self.reach(Kind::Point, marker::KERNEL);
            self.reach(Kind::Begin, marker::PRINTED);
        }
        // SAFETY: as above.
        unsafe { qemu::qemu_plugin_u64_set(last, vcpu, owner as u64) };
    }

    /// A byte is written to a port.
    fn write(&self, port: u64, byte: u8) {
        // What a driver sets its line up with before is no part of the text.
        let printed = port == COM1 && self.state().text.as_mut().is_some_and(|text| text.takes(byte));
        if printed {
            self.reach(Kind::End, marker::PRINTED);
        }
    }

    fn reach(&self, kind: Kind, number: u16) {
        let mut state = self.state();
        let now = self.now(&state);
        match kind {
            Kind::Begin => {
                state.open.insert(number, now);
            }
            Kind::End => {
                if let Some(then) = state.open.remove(&number) {
                    state.report("window", number, &now, &then);
                }
            }
            Kind::Point => state.report("point", number, &now, &Snapshot::default()),
        }
    }

    fn translate(&self, tb: *mut Tb) {
        // SAFETY: `tb` is the block that is being translated, in every call of this function.
        let (length, address) = unsafe { (qemu::qemu_plugin_tb_n_insns(tb), qemu::qemu_plugin_tb_vaddr(tb)) };
        let mut state = self.state();
        let owner = state.owners.of(address);
        let place = state.place(owner, address);
        let (stays, prints) = (state.stays.is_some(), state.text.is_some());
        drop(state);
        let data = match owner {
            // Ring 0 is in the upper half, so its addresses are no numbers of owners.
            Owner::Ring0 => address as *mut c_void,
            owner => owner as usize as *mut c_void,
        };
        // SAFETY: `tb` as above; the numbers are inside the scoreboard; `on_enter` takes these data.
        unsafe {
            qemu::qemu_plugin_register_vcpu_tb_exec_cond_cb(
                tb,
                on_enter,
                qemu::NO_REGISTERS,
                qemu::NOT_EQUAL,
                self.counter(LAST),
                owner as u64,
                data,
            );
            let insns = self.counter(INSNS + owner as usize);
            qemu::qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, qemu::ADD, insns, length as u64);
            if let Some(place) = place {
                let at = self.counter(AT + place);
                qemu::qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, qemu::ADD, at, length as u64);
            }
        }
        for index in 0..length {
            // SAFETY: `tb` as above, and the index is below the number of its instructions.
            let insn = unsafe { qemu::qemu_plugin_tb_get_insn(tb, index) };
            self.look(insn, owner, stays, prints);
        }
    }

    /// Watches an instruction if it means something; SYSCALL does if `stays` are counted, OUT if a text is waited for.
    fn look(&self, insn: *mut Insn, owner: Owner, stays: bool, prints: bool) {
        let mut code = [0; 16];
        // SAFETY: `insn` belongs to the block that is being translated; at most 16 bytes are written to `code`.
        let length = unsafe {
            qemu::qemu_plugin_insn_data(insn, code.as_mut_ptr().cast(), code.len());
            qemu::qemu_plugin_insn_size(insn).min(code.len())
        };
        let code = &code[..length];
        if code::loads_cr3(code) {
            let loads = self.counter(CR3 + owner as usize);
            // SAFETY: `insn` as above, and the number is inside the scoreboard.
            unsafe { qemu::qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, qemu::ADD, loads, 1) };
        } else if let Some((kind, number)) = code::marker(code) {
            let data = ((kind as usize) << 16 | usize::from(number)) as *mut c_void;
            // SAFETY: `insn` as above; `on_marker` takes a kind and a number for data.
            unsafe { qemu::qemu_plugin_register_vcpu_insn_exec_cb(insn, on_marker, qemu::NO_REGISTERS, data) };
        } else if stays && code::is_syscall(code) {
            let data = usize::from(owner == Owner::User) as *mut c_void;
            // SAFETY: `insn` as above; `on_syscall` reads registers, and takes 1 for a program's call.
            unsafe { qemu::qemu_plugin_register_vcpu_insn_exec_cb(insn, on_syscall, qemu::READ_REGISTERS, data) };
        } else if prints && code::writes_port(code) {
            let data = std::ptr::null_mut();
            // SAFETY: `insn` as above; `on_write` reads registers, and takes no data.
            unsafe { qemu::qemu_plugin_register_vcpu_insn_exec_cb(insn, on_write, qemu::READ_REGISTERS, data) };
        }
    }
}

impl State {
    /// The place to which a block's instructions are added, if that is wanted.
    fn place(&mut self, owner: Owner, address: u64) -> Option<usize> {
        if !self.profile || !matches!(owner, Owner::Ring0 | Owner::Dom0) {
            return None;
        }
        if let Some(place) = self.places.get(&address) {
            return Some(*place);
        }
        if self.addresses.len() == PLACES {
            return Some(PLACES - 1);
        }
        let place = self.addresses.len();
        self.addresses.push(address);
        self.places.insert(address, place);
        Some(place)
    }

    /// Writes what was counted between `then` and `now`.
    fn report(&mut self, what: &str, number: u16, now: &Snapshot, then: &Snapshot) {
        let count = |index: usize| now.counts[index] - then.counts.get(index).copied().unwrap_or(0);
        let mut line = format!("{what} {number}");
        let mut add = |key: String, count: u64| {
            if count != 0 {
                line += &format!(" {key}={count}");
            }
        };
        for (index, owner) in Owner::ALL.into_iter().enumerate() {
            add(format!("insns.{}", owner.name()), count(INSNS + index));
            add(format!("cr3.{}", owner.name()), count(CR3 + index));
        }
        for (from, before) in Owner::ALL.into_iter().enumerate() {
            for (to, owner) in Owner::ALL.into_iter().enumerate() {
                add(format!("entry.{}.{}", before.name(), owner.name()), count(ENTRIES + from * OWNERS + to));
            }
        }
        line.push('\n');
        if what != "point" {
            let used = self.addresses.iter().enumerate().map(|(place, address)| (address, count(AT + place)));
            line.extend(used.filter(|(_, n)| *n != 0).map(|(address, n)| format!("at {address:x} {n}\n")));
            if let Some(stays) = &self.stays {
                line += &stays.lines(&now.stays, &then.stays);
            }
        }
        // The reader sees that lines are missing; the machine runs on.
        let _ = self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush());
    }
}

/// Makes the plugin out of its arguments.
pub(crate) fn install(id: Id, arguments: &[String]) -> Result<(), String> {
    let mut owners = Owners::default();
    let (mut out, mut profile, mut stays, mut text) = (None, false, None, None);
    for argument in arguments {
        match argument.split_once('=') {
            Some(("out", path)) => {
                out = Some(File::create(path).map_err(|why| format!("cannot create {path}: {why}"))?);
            }
            Some(("dom0", range)) => owners.dom0 = parse_range(range)?,
            Some(("until", wanted)) if !wanted.is_empty() => text = Some(Text::new(wanted)),
            Some(("profile", "on")) => profile = true,
            Some(("profile", "off")) => profile = false,
            Some(("stays", "on")) => stays = Some(Stays::default()),
            Some(("stays", "off")) => stays = None,
            _ => {
                return Err(format!(
                    "unknown argument {argument}; there are out=, dom0=, until=, profile=on, stays=on"
                ));
            }
        }
    }
    let out = BufWriter::new(out.ok_or("out=FILE is missing")?);
    let size = if profile { AT + PLACES } else { AT };
    // SAFETY: any size will do.
    let score = Board(unsafe { qemu::qemu_plugin_scoreboard_new(size * size_of::<u64>()) });
    let state = State {
        owners,
        profile,
        places: HashMap::new(),
        addresses: Vec::new(),
        entries: [0; OWNERS * OWNERS],
        stays,
        kernel_is_awaited: true,
        text,
        open: HashMap::new(),
        out,
    };
    if PLUGIN.set(Plugin { score, state: Mutex::new(state) }).is_err() {
        return Err("there is one already".into());
    }
    // SAFETY: `id` is ours, and the functions have the types QEMU asks for.
    unsafe {
        qemu::qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
        qemu::qemu_plugin_register_atexit_cb(id, on_exit, std::ptr::null_mut());
    }
    Ok(())
}

/// `LOW-HIGH` in hexadecimal.
fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let parse = |text| u64::from_str_radix(text, 16).ok();
    let range = text.split_once('-').and_then(|(low, high)| Some((parse(low)?, parse(high)?)));
    range.ok_or_else(|| format!("{text} is no range of addresses"))
}

extern "C" fn on_translate(_id: Id, tb: *mut Tb) {
    if let Some(plugin) = PLUGIN.get() {
        plugin.translate(tb);
    }
}

extern "C" fn on_enter(vcpu: c_uint, data: *mut c_void) {
    if let Some(plugin) = PLUGIN.get() {
        plugin.enter(vcpu, data as usize);
    }
}

extern "C" fn on_syscall(_vcpu: c_uint, program: *mut c_void) {
    let rax = if program.is_null() { qemu::register(Name::Rax) } else { None };
    if let Some(stays) = PLUGIN.get().map(Plugin::state).as_mut().and_then(|state| state.stays.as_mut()) {
        stays.call(rax);
    }
}

extern "C" fn on_write(_vcpu: c_uint, _data: *mut c_void) {
    let registers = (qemu::register(Name::Rdx), qemu::register(Name::Rax));
    if let (Some(plugin), (Some(port), Some(byte))) = (PLUGIN.get(), registers) {
        plugin.write(port & 0xffff, byte.to_le_bytes()[0]);
    }
}

extern "C" fn on_marker(_vcpu: c_uint, data: *mut c_void) {
    let data = data as usize;
    let kind = match data >> 16 {
        0 => Kind::Begin,
        1 => Kind::End,
        _ => Kind::Point,
    };
    if let Some(plugin) = PLUGIN.get() {
        plugin.reach(kind, u16::try_from(data & 0xffff).unwrap_or_default());
    }
}

extern "C" fn on_exit(_id: Id, _data: *mut c_void) {
    if let Some(plugin) = PLUGIN.get() {
        let mut state = plugin.state();
        let now = plugin.now(&state);
        state.report("total", 0, &now, &Snapshot::default());
    }
}
