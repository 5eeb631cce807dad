//! The last requests of a guest's kernel that ring 0 refused, in words. If a guest died, they often show why.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypercall_abi::tenon::{Refusal, RefusalKind, Refusals};
use hypercall_abi::{Errno, Hypercall};

/// One line for each refusal, from the oldest to the newest.
#[must_use]
pub fn lines(refusals: &Refusals) -> Vec<String> {
    let count = usize::try_from(refusals.count).unwrap_or(usize::MAX);
    refusals.list.iter().take(count).map(line).collect()
}

fn line(refusal: &Refusal) -> String {
    let Refusal { kind, vcpu, errno, times, number, args: [first, second] } = *refusal;
    let error = Errno::from_number(errno.into());
    let error = error.map_or_else(|| format!("error {errno}"), |known| known.name().to_string());
    let what = match RefusalKind::from_number(kind.into()) {
        Some(RefusalKind::Call) => {
            let name =
                Hypercall::from_number(number).map_or_else(|| format!("call {number}"), |call| call.name().into());
            format!("{name} {first:#x} {second:#x}: {error}")
        }
        Some(RefusalKind::TableWrite) => {
            format!("entry {second:#x} for a page table at {first:#x}: {error}, rip {number:#x}")
        }
        Some(RefusalKind::Instruction) => format!("instruction {}: fault 13, rip {number:#x}", code(first)),
        Some(RefusalKind::ReadMsr) => format!("rdmsr {first:#x}: fault 13, rip {number:#x}"),
        Some(RefusalKind::WriteMsr) => format!("wrmsr {first:#x} {second:#x}: fault 13, rip {number:#x}"),
        None => format!("something ({kind})"),
    };
    let often = if times > 1 { format!(" ({times} times)") } else { String::new() };
    format!("vcpu {vcpu}: {what}{often}")
}

/// Bytes of code in hexadecimal, as disassemblers accept them.
fn code(bytes: u64) -> String {
    let bytes: Vec<String> = bytes.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}
