//! Stories of guests' network devices under harm and load.

use crate::blocks::{console, shell};
use crate::networks::{FETCHED, address, enter, guest, start, value, vif};
use crate::stories::{BOOT, SOON, dom0, image, test_guest};
use anyhow::{Context, Result, bail, ensure};
use boot::answers::{LEAVE, done, number};
use boot::{Machine, Setup};
use serde_json::{Value, json};
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use xtask::bundle::{Bundle, Guest};
use xtask::{initramfs, kernels};

/// The address of a guest that others send to.
const PEER: &str = "00:16:3e:00:00:09";

/// Our own small guest that is a front end of network devices, with these words on its command line.
fn front_end(name: &str, words: &str, vifs: &[&str]) -> Result<Guest> {
    let vif = vifs.iter().map(|text| text.parse().map_err(anyhow::Error::msg)).collect::<Result<_>>()?;
    Ok(Guest { vif, ..test_guest(name, "net", words)? })
}

/// Lets a guest serve a file of so many MiB with bytes that nobody knows, and returns the file's sum.
fn serve(machine: &mut Machine, name: &str, mib: u32) -> Result<String> {
    enter(machine, name, "eth0")?;
    // The parts differ, so that none can stand for another.
    let file = format!("for n in $(seq {mib}); do echo $n; cat part; done > www/data");
    shell(machine, &format!("mkdir www && head -c 1048576 /dev/urandom > part && {file} && httpd -h www"))?;
    value(machine, "md5sum < www/data", SOON)
}

/// Lets a guest fetch the file of a server again and again in the background, and keep the sums.
fn begin_fetching(machine: &mut Machine, name: &str, server: Ipv4Addr) -> Result<()> {
    enter(machine, name, "eth0")?;
    let fetch = format!("wget -q -O - http://{server}/data | md5sum");
    machine.type_line(&format!("rm -f stop; (while [ ! -e stop ]; do {fetch}; done > sums; touch over) &"))?;
    shell(machine, "for n in $(seq 25); do grep -q . sums && break; sleep 1; done; grep -q . sums")
}

/// Ends what [`begin_fetching`] began. Returns how often the file was fetched. An error if it was once another file.
fn end_fetching(machine: &mut Machine, name: &str, sum: &str) -> Result<u32> {
    console(machine, name)?;
    shell(machine, "touch stop; for n in $(seq 25); do [ -e over ] && break; sleep 1; done; rm over")?;
    let sum = sum.split(' ').next().unwrap_or(sum);
    let (all, right) = ("grep -c . sums", format!("grep -c '^{sum} ' sums"));
    let (all, right) = (value(machine, all, SOON)?.parse::<u32>()?, value(machine, &right, SOON)?.parse::<u32>()?);
    ensure!(all == right && all > 0, "{name}: {all} files were fetched, and {right} of them are right");
    Ok(all)
}

/// Boots a machine of a GiB with this bundle, for at most so long.
fn start_for(title: &str, bundle: Bundle, limit: Duration) -> Result<Machine> {
    Machine::boot(title, &Setup { memory: 1024, limit, ..Setup::new(bundle) })
}

/// KiB of dom0.
fn footprint(machine: &mut Machine) -> Result<u64> {
    number(&machine.ask("info")?, "dom0_kib")
}

/// Attaches a device to a guest.
fn attach(machine: &mut Machine, name: &str, config: &str) -> Result<()> {
    machine.require_answer(&format!("network-attach {name} {config}"), &done("network-attach", name))
}

/// Waits until a device of a guest is in this state.
fn becomes(machine: &mut Machine, name: &str, device: u64, state: &str) -> Result<Value> {
    machine.ask_until("network-list", |list| vif(list, name, device).is_ok_and(|vif| vif["state"] == state))
}

/// Fifty thousand slots with any contents, changed while they are served, go from one guest into both of its devices, to a
/// stock neighbour, and to anybody. Each slot gets one answer, each broken rule ends the connection with its reason, what is
/// dropped is counted by its reason, and nothing of the guest stays in use. Meanwhile the neighbour serves a file to a third
/// guest, whole each time.
pub(crate) fn any_slots_of_a_network_device_harm_nobody() -> Result<()> {
    let words = format!("do=count peer={PEER}");
    let server = format!("bridge=lan,mac={PEER}");
    let bundle = dom0("")?
        .guest(&guest("web", kernels::DEFAULT, 128, &["bridge=lan"])?)
        .guest(&guest("db", kernels::DEFAULT, 160, &[&server])?)
        .guest(&front_end("bad", &words, &[])?);
    let mut machine = start_for("any_slots_of_a_network_device_harm_nobody", bundle, Duration::from_secs(240))?;
    // The first guest that is made takes the terminal.
    enter(&mut machine, "web", "eth0")?;
    let sum = serve(&mut machine, "db", 16)?;
    let db = address(&mut machine, "db")?;
    begin_fetching(&mut machine, "web", db)?;
    let before = footprint(&mut machine)?;
    for _ in 0..2 {
        attach(&mut machine, "bad", "bridge=lan")?;
    }
    machine.type_keys(LEAVE)?;
    machine.type_line("console bad")?;
    machine.expect("net: seed=", SOON)?;
    let seen = machine.expect("net: counted ", BOOT)?;
    let counted = machine.expect("\n", SOON)?;
    println!("{seen}{counted}");
    let list = machine.ask("network-list bad")?;
    println!("{list}");
    let buffers = counted.split_whitespace().nth(3).and_then(|count| count.parse::<u32>().ok());
    ensure!(buffers >= Some(3000), "so few buffers were filled: {counted}");
    for device in 0..2 {
        let drops = &vif(&list, "bad", device)?["drops"];
        let reasons = ["spoofed", "malformed", "oversize", "bad-grant", "unknown", "bad-buffer"];
        ensure!(reasons.iter().all(|reason| drops[reason].as_u64() > Some(0)), "not for all reasons: {list}");
    }
    machine.require_answer("destroy bad", &done("destroy", "bad"))?;
    let fetched = end_fetching(&mut machine, "web", &sum)?;
    println!("the neighbour's file was fetched {fetched} times");
    let list = machine.ask("network-list")?;
    ensure!(list.as_array().is_some_and(|list| list.len() == 2), "{list}");
    ensure!(number(vif(&list, "db", 0)?, "received")? > 0, "{list}");
    for name in ["web", "db"] {
        let drops = &vif(&list, name, 0)?["drops"];
        let faults = ["malformed", "bad-grant", "bad-buffer", "spoofed"];
        ensure!(faults.iter().all(|fault| drops[fault].is_null()), "{list}");
    }
    let after = footprint(&mut machine)?;
    ensure!(after <= before + 64, "dom0 had {before} KiB, and has {after} KiB");
    for name in ["web", "db"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// Random numbers: splitmix.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }
}

/// How many devices a guest is given at once.
const PLUGGED: u64 = 4;

/// A guest is given four devices, sends by each of them, and loses them, in any order and by force or not, while it sends and
/// while it does not, or before it has seen them. Now and then the guest is destroyed in the middle, and made again.
pub(crate) fn a_hundred_re_plugs_leave_nothing() -> Result<()> {
    re_plugs("a_hundred_re_plugs_leave_nothing", 25)
}

/// As above, so many times.
pub(crate) fn re_plugs(title: &str, rounds: u64) -> Result<()> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    println!("{title}: seed {seed}");
    let mut random = Random(seed);
    let bundle = dom0("")?.guest(&guest("web", kernels::DEFAULT, 128, &["bridge=lan"])?).guest(&guest(
        "db",
        kernels::DEFAULT,
        128,
        &["bridge=lan"],
    )?);
    let mut machine = start_for(title, bundle, Duration::from_secs(180 + 8 * rounds))?;
    // The first guest that is made takes the terminal.
    enter(&mut machine, "web", "eth0")?;
    let sum = serve(&mut machine, "db", 2)?;
    let db = address(&mut machine, "db")?;
    let mut kib = Vec::new();
    for round in 0..rounds {
        enter(&mut machine, "web", "eth0")?;
        for _ in 0..PLUGGED {
            attach(&mut machine, "web", "bridge=lan")?;
        }
        // The devices may go before the guest has seen them.
        if random.below(5) > 0 {
            for device in 1..=PLUGGED {
                becomes(&mut machine, "web", device, "connected")?;
            }
            console(&mut machine, "web")?;
            // Each device answers for its own address alone.
            shell(&mut machine, "cd /proc/sys/net/ipv4/conf/all && echo 1 > arp_ignore && echo 2 > arp_announce")?;
            let up = "ip addr add 10.77.1.20$n/24 dev eth$n && ip link set eth$n up";
            let send = format!("ping -q -c 3 -A -s 8000 -w 20 -I eth$n {db}");
            shell(&mut machine, &format!("for n in $(seq {PLUGGED}); do {up} && {send} || exit 1; done"))?;
            if random.below(2) == 0 {
                let endless =
                    format!("while [ -e burst ]; do ping -q -c 1000 -A -s 8000 -I eth$n {db}; usleep 20000; done");
                shell(
                    &mut machine,
                    &format!("touch burst; for n in $(seq {PLUGGED}); do ({endless}) > /dev/null 2>&1 & done"),
                )?;
            }
        }
        if round % 8 == 7 {
            machine.require_answer("destroy web", &done("destroy", "web"))?;
            let made = machine.ask("create web")?;
            ensure!(made["done"] == "create", "{made}");
        } else {
            let mut left: Vec<u64> = (1..=PLUGGED).collect();
            while !left.is_empty() {
                let at = usize::try_from(random.below(left.len() as u64))?;
                let force = if random.below(3) == 0 { " --force" } else { "" };
                let command = format!("network-detach web {}{force}", left.swap_remove(at));
                machine.require_answer(&command, &done("network-detach", "web"))?;
            }
            enter(&mut machine, "web", "eth0")?;
            shell(
                &mut machine,
                "rm -f burst; for n in $(seq 20); do ls /sys/class/net | grep -q 'eth[1-9]' || exit 0; sleep 1; done; exit 1",
            )?;
        }
        if round == 3 || round + 1 == rounds {
            enter(&mut machine, "web", "eth0")?;
            let fetched = value(&mut machine, &format!("wget -q -O - http://{db}/data | md5sum"), SOON)?;
            ensure!(fetched.starts_with(&sum), "{fetched} was fetched, not {sum}");
            kib.push(footprint(&mut machine)?);
        }
    }
    println!("{title}: dom0 had {kib:?} KiB");
    ensure!(kib[1] <= kib[0] + 64, "KiB of dom0: {kib:?}");
    let list = machine.ask("network-list")?;
    ensure!(list.as_array().is_some_and(|list| list.len() == 2), "{list}");
    for name in ["web", "db"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// The ramdisk of a guest, and the program `offloads` of our own.
fn with_offloads(guest: Guest, folder: &Path) -> Result<Guest> {
    let ramdisk = guest.ramdisk.context("no ramdisk")?;
    let mut bytes = fs::read(ramdisk)?;
    // The kernel unpacks one archive after the other. The second begins at a multiple of four bytes.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(initramfs::of_programs(&[("bin/offloads", &fs::read(image("offloads")?)?)])?);
    let target = folder.join(format!("{}.cpio", guest.name));
    fs::write(&target, bytes)?;
    Ok(Guest { ramdisk: Some(target), ..guest })
}

/// A number that a guest has counted for its device eth0.
fn counted(machine: &mut Machine, device: &str, what: &str) -> Result<u64> {
    Ok(value(machine, &format!("cat /sys/class/net/{device}/statistics/{what}"), SOON)?.parse()?)
}

/// Guests fetch files by IPv4 and by IPv6 when both, one, or none of them lets its device cut and join packets. The bytes are
/// right, and no packet arrives damaged.
pub(crate) fn files_arrive_whoever_cuts_packets() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut bundle = dom0("")?;
    for (name, kernel) in [("old", "6.1"), ("new", "6.12")] {
        bundle = bundle.guest(&with_offloads(guest(name, kernel, 320, &["bridge=lan"])?, folder.path())?);
    }
    let mut machine = start("files_arrive_whoever_cuts_packets", bundle, None)?;
    let sum = serve(&mut machine, "old", 64)?;
    let link = value(&mut machine, "ip -6 -o addr show dev eth0 scope link | sed 's/.*inet6 //; s,/.*,,'", SOON)?;
    let old = address(&mut machine, "old")?;
    let hosts = [old.to_string(), format!("[{link}%eth0]")];
    for (round, [sender, receiver]) in [["off", "off"], ["off", "on"], ["on", "off"]].into_iter().enumerate() {
        enter(&mut machine, "old", "eth0")?;
        shell(&mut machine, &format!("offloads eth0 {sender}"))?;
        let before = [counted(&mut machine, "eth0", "tx_bytes")?, counted(&mut machine, "eth0", "tx_packets")?];
        enter(&mut machine, "new", "eth0")?;
        shell(&mut machine, &format!("offloads eth0 {receiver}"))?;
        let begin = Instant::now();
        let host = &hosts[round % 2];
        let fetched = value(&mut machine, &format!("wget -q -O - 'http://{host}/data' | md5sum"), FETCHED)?;
        let seconds = begin.elapsed().as_secs_f64();
        ensure!(fetched == sum, "{fetched} was fetched from {host}, not {sum}");
        ensure!(counted(&mut machine, "eth0", "rx_errors")? == 0, "packets were damaged");
        console(&mut machine, "old")?;
        let bytes = counted(&mut machine, "eth0", "tx_bytes")? - before[0];
        let packets = counted(&mut machine, "eth0", "tx_packets")? - before[1];
        ensure!(counted(&mut machine, "eth0", "rx_errors")? == 0, "packets were damaged");
        let each = bytes / packets;
        println!("sender {sender}, receiver {receiver}, {host}: 64 MiB in {seconds:.1} s, {each} bytes a packet");
        ensure!(if sender == "off" { each <= 1514 } else { each > 4000 }, "{each} bytes a packet");
    }
    let list = machine.ask("network-list")?;
    for name in ["old", "new"] {
        ensure!(vif(&list, name, 0)?["drops"] == json!({}), "{list}");
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// Nanoseconds that a guest needs to fetch a file twice, by its clock.
fn time_to_fetch(machine: &mut Machine, name: &str, server: Ipv4Addr) -> Result<u64> {
    console(machine, name)?;
    let now = "$(sed -n 's/^now at \\([0-9]*\\) .*/\\1/p' /proc/timer_list)";
    let fetch = format!("for n in 1 2; do wget -q -O - http://{server}/data > /dev/null || exit 1; done");
    let time = value(machine, &format!("a={now}; {fetch}; b={now}; echo $((b - a))"), FETCHED)?;
    time.parse().with_context(|| format!("no time: {time:?}"))
}

/// A guest that posts no buffers is sent 16,000 packets a second, while a healthy pair transfers. By a clock that counts
/// instructions, the pair keeps nine tenths of its throughput. A sender that floods as fast as it can takes time from the pair
/// wherever the flood goes: the pair keeps four fifths of what it has when the flood goes to nobody. The drops are counted with
/// their reason.
pub(crate) fn a_receiver_without_buffers_slows_nobody() -> Result<()> {
    const NOBODY: &str = "00:16:3e:00:00:07";
    let hole = format!("bridge=lan,mac={PEER}");
    let bundle = dom0("")?
        .guest(&guest("web", kernels::DEFAULT, 128, &["bridge=lan"])?)
        .guest(&guest("db", kernels::DEFAULT, 160, &["bridge=lan"])?)
        .guest(&front_end("hole", "do=stall", &[&hole])?)
        .guest(&front_end("some", &format!("do=flood once=64 after=4000 peer={PEER}"), &[])?)
        .guest(&front_end("lost", &format!("do=flood peer={NOBODY}"), &[])?)
        .guest(&front_end("flood", &format!("do=flood peer={PEER}"), &[])?);
    let setup = Setup { memory: 1024, limit: Duration::from_secs(360), counted: true, ..Setup::new(bundle) };
    let mut machine = Machine::boot("a_receiver_without_buffers_slows_nobody", &setup)?;
    // The first guest that is made takes the terminal.
    enter(&mut machine, "web", "eth0")?;
    let sum = serve(&mut machine, "db", 16)?;
    let db = address(&mut machine, "db")?;
    enter(&mut machine, "web", "eth0")?;
    let fetched = value(&mut machine, &format!("wget -q -O - http://{db}/data | md5sum"), FETCHED)?;
    ensure!(fetched == sum, "{fetched} was fetched, not {sum}");
    let mut times = vec![time_to_fetch(&mut machine, "web", db)?];
    for (name, loser, reason) in
        [("some", "hole", "stalled"), ("lost", "lost", "unknown"), ("flood", "hole", "stalled")]
    {
        attach(&mut machine, name, "bridge=lan")?;
        let lost = |list: &Value| vif(list, loser, 0).ok().and_then(|vif| vif["drops"][reason].as_u64()).unwrap_or(0);
        let before = lost(&machine.ask("network-list")?);
        let before = lost(&machine.ask_until("network-list", |list| lost(list) > before + 1000)?);
        times.push(time_to_fetch(&mut machine, "web", db)?);
        let list = machine.ask("network-list")?;
        let dropped = lost(&list) - before;
        println!("{name}: {dropped} packets dropped as {reason}: {}", vif(&list, loser, 0)?);
        ensure!(dropped > 1000, "no flood: {list}");
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    let [alone, some, lost, flood] = *times else { bail!("{times:?}") };
    println!("32 MiB alone in {alone} ns, beside 16,000 packets a second to a guest without buffers in {some} ns");
    println!("32 MiB beside a flood to nobody in {lost} ns, and to a guest without buffers in {flood} ns");
    ensure!(alone * 10 >= some * 9 && lost * 10 >= flood * 8, "{times:?}");
    let list = machine.ask("network-list")?;
    for name in ["web", "db"] {
        ensure!(vif(&list, name, 0)?["drops"] == json!({}), "{list}");
    }
    for name in ["web", "db", "hole"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// A guest with two devices leads a connection from one network to another. The packets stay long, their sums are right, and
/// none is damaged or dropped.
pub(crate) fn a_guest_routes_between_networks() -> Result<()> {
    let bundle = dom0("")?
        .guest(&guest("left", kernels::DEFAULT, 128, &["bridge=one"])?)
        .guest(&guest("router", kernels::DEFAULT, 128, &["bridge=one", "bridge=two"])?)
        .guest(&guest("right", kernels::DEFAULT, 256, &["bridge=two"])?);
    let mut machine = start("a_guest_routes_between_networks", bundle, None)?;
    // The first guest that is made takes the terminal.
    enter(&mut machine, "left", "eth0")?;
    let sum = serve(&mut machine, "right", 64)?;
    enter(&mut machine, "router", "eth0")?;
    enter(&mut machine, "router", "eth1")?;
    shell(&mut machine, "echo 1 > /proc/sys/net/ipv4/ip_forward")?;
    let list = machine.ask("network-list")?;
    let at = |name, device| -> Result<Ipv4Addr> {
        Ok(vif(&list, name, device)?["ip"].as_str().context("no address")?.parse()?)
    };
    let (left, right, here, there) = (at("left", 0)?, at("right", 0)?, at("router", 0)?, at("router", 1)?);
    for (name, other, gateway) in [("right", left, there), ("left", right, here)] {
        enter(&mut machine, name, "eth0")?;
        shell(&mut machine, &format!("ip route add {other}/32 via {gateway}"))?;
    }
    let begin = Instant::now();
    let fetched = value(&mut machine, &format!("wget -q -O - http://{right}/data | md5sum"), FETCHED)?;
    println!("64 MiB by a router in {:.1} s", begin.elapsed().as_secs_f64());
    ensure!(fetched == sum, "{fetched} was fetched, not {sum}");
    for (name, device) in [("left", "eth0"), ("router", "eth0"), ("router", "eth1"), ("right", "eth0")] {
        console(&mut machine, name)?;
        let wrong = counted(&mut machine, device, "rx_errors")?;
        ensure!(wrong == 0, "{name}: {device}: {wrong} packets were damaged");
        if name == "router" && device == "eth0" {
            let each = counted(&mut machine, device, "tx_bytes")? / counted(&mut machine, device, "tx_packets")?;
            println!("the router sends {each} bytes a packet");
            ensure!(each > 4000, "{each} bytes a packet: they were cut");
        }
    }
    let list = machine.ask("network-list")?;
    for row in list.as_array().into_iter().flatten() {
        ensure!(row["drops"] == json!({}), "{list}");
    }
    for name in ["left", "router", "right"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}
